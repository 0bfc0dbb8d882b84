"""What both ends of the link share."""
