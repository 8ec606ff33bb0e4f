"""Sets of generated tasks of which one is bad, each in another way."""

from echo_jax.tasks.generate import generate_tasks


def break_user(task):
    """The local sandbox has one account and refuses the line."""
    (task / 'environment' / 'Dockerfile').write_text('FROM debian\nUSER nobody\nWORKDIR /app\n')
    return 'USER'


def break_link(task):
    (task / 'tests' / 'data').symlink_to('/etc')
    return 'leads outside'


def break_encoding(task):
    (task / 'environment' / 'Dockerfile').write_bytes(b'FROM debian\nENV NAME=caf\xe9\n')
    return 'UTF-8'


def make_set(folder, damage):
    """Five tasks, the third of them bad; its id, and what the reason for that must say."""
    generate_tasks(folder, split='train', count=5)
    bad = sorted(path for path in folder.iterdir() if path.is_dir())[2]
    return bad.name, damage(bad)
