"""What both ends of a link share: the protocol, credentials, and the encoding of hidden states."""

import os

# gRPC's core writes what the other side sends (the debug text of GOAWAY, TLS server names) to stderr as it
# is, line breaks and escapes included. It reads this when it is imported: no module here does so earlier.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
