"""The Open Inference Protocol (KServe, Triton): a dialect over predictor, store and residency."""
