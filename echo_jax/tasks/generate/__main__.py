"""The generator's program. It needs no recipe, so its flags are argparse's.

python -m echo_jax.tasks.generate --output=DIR --split=train --count=500 --seed=0
"""

import argparse

from echo_jax.tasks.generate import FAMILIES, MACHINE_FAMILIES, SPLITS, generate_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description='Writes small Harbor tasks.')
    parser.add_argument('--output', required=True, help='folder to write; must not exist yet')
    parser.add_argument('--split', default='train', choices=(*SPLITS, 'explore'))
    parser.add_argument('--count', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    families = f'comma-separated; beside these, {" and ".join(MACHINE_FAMILIES)}'
    parser.add_argument('--families', default=','.join(FAMILIES), help=families)
    args = parser.parse_args()
    try:
        generate_tasks(
            args.output,
            split=args.split,
            count=args.count,
            seed=args.seed,
            families=args.families.split(','),
        )
    except ValueError as error:
        parser.error(str(error))
    print(f'{args.count} {args.split} tasks in {args.output}')


if __name__ == '__main__':
    main()
