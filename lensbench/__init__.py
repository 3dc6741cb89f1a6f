"""lensbench: does a language model refine one prediction, kept in one representation, layer by layer?"""

__version__ = "0.1.0"
