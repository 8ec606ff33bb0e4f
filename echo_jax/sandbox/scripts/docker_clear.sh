# shellcheck shell=bash
# Makes /logs/verifier and /tests real and empty directories, whatever the agent made of them. Runs as
# root; fails if something cannot be removed.
for d in /logs /logs/verifier /tests; do
  if [ -L "$d" ] || [ ! -d "$d" ]; then rm -rf "$d"; mkdir "$d"; fi
done
chmod 755 /logs /tests
chmod 777 /logs/verifier
find /tests /logs/verifier -mindepth 1 -delete || exit
