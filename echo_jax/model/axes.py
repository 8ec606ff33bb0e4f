"""Logical axes of the activations, by which the model's modules say how their arrays lie on a mesh.

Parameters have theirs in the family's table (family.py); `learner/sharding.py` maps both to a mesh.
"""

TOKENS = ('rows', 'tokens')
STATES = ('rows', 'tokens', None)
QUERIES = ('rows', 'tokens', 'heads', None)
# A token may attend to any earlier one of its row, so a device needs the keys of whole rows, also
# when it has the queries of a part of them only.
KEYS = ('rows', None, 'kv_heads', None)
# Of queries, keys, values, the segments of the queries and the segments of the keys.
ATTENTION = (QUERIES, KEYS, KEYS, TOKENS, ('rows', None))
