"""What must not go out: secrets, traces of a machine, damaged weights, missing licences, broken cards."""
