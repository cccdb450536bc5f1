"""What is learned, in the form in which it serves."""
