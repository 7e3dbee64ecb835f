"""Codecs: how a weight matrix becomes packed bytes, ``encode(weight [out, in], parameters, statistics) -> QTensor``."""
