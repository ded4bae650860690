"""What every layer promises (cowfs/layers/base.py), held against every kind of layer there is."""
