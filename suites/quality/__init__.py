"""How good a method is: the language model with changed layers, judged on text against the dense one."""
