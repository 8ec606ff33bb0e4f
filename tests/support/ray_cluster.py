"""Runs a Ray cluster of two nodes on this machine, with a CPU each, for test_fleet.py; needs Ray.

It prints its address. A line `kill` on stdin ends the second node by SIGKILL; the end of stdin ends
the cluster.
"""

import sys

from ray.cluster_utils import Cluster

if __name__ == '__main__':
    cluster = Cluster(
        initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False}
    )
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print(f'address {cluster.address}', flush=True)
    for line in sys.stdin:
        if line == 'kill\n':
            cluster.remove_node(node, allow_graceful=False)
            print('killed', flush=True)
    cluster.shutdown()
