"""The Hydra configuration of ``moebench run``; groups for plug-ins are made from their descriptors."""
