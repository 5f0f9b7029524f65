"""Block-sparse softmax: dense softmax that leaves out whole blocks of keys, by thresholds or by a given grid."""
