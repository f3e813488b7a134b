"""Models by name: the known ones, the installed ones, and how one becomes the other and back."""
