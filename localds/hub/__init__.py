"""The model hub: what it lists, its cache on this disk, and files from the one to the other."""
