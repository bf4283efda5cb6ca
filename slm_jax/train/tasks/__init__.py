"""Tasks, one file each: what is trained and with which loss."""
