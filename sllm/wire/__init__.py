"""What both ends of the link share: the protocol, credentials, and an emulated link."""
