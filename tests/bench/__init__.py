import os

# gRPC's own handling of fork crashes a child of a process that runs uvloop before its exec, once in a while.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
