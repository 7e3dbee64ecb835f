"""Folding scales into a layer before it is quantized (EAQuant), and a quantized router that keeps its choices."""
