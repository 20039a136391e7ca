"""What the verbs of the command line run, one file per verb."""
