"""The logical axes of activations, by which the model says how they lie on a mesh.

The axes of parameters are in the family's table (family.py). `learner/sharding.py` maps both to
the mesh.
"""

TOKENS = ('rows', 'tokens')
STATES = ('rows', 'tokens', None)
QUERIES = ('rows', 'tokens', 'heads', None)
# A token may attend to any earlier one of its row, so a device needs the keys of whole rows, even
# if it has the queries of only a part of them.
KEYS = ('rows', None, 'kv_heads', None)
# The axes of queries, keys, values, the queries' segments and the keys' segments, in this order.
ATTENTION = (QUERIES, KEYS, KEYS, TOKENS, ('rows', None))
