"""What both ends of a link share: the protocol, credentials, and the encoding of hidden states."""
