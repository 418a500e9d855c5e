"""What a person sees of a run: its report, its history, the charts of both."""
