"""Training and evaluation."""

import os

# tensorboard_logger ships generated protobuf code that current protobuf reads only in its pure-Python form. The
# variable counts only if it is set before anything imports protobuf; a package's __init__ runs before its modules.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
