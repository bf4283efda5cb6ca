"""Building blocks of models, one file each."""
