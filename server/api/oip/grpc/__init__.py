"""The Open Inference Protocol over gRPC, on a port of its own (LENSRACK_GRPC_PORT); needs the extra `grpc`."""
