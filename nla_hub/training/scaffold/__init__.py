"""The first files of a plug-in for a new base model."""
