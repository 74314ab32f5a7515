#!/bin/sh
# install_system.sh TARGET "PACKAGES" COMMAND...: what a make target needs of the distribution, unless one of the commands is there.
set -eu
target=$1 packages=$2
shift 2
for name; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing $packages with apt-get ..."
  apt-get update -qq
  # shellcheck disable=SC2086 # several words on purpose
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
else
  echo "make $target needs $1, and only root can install it: apt-get install $packages (or your system's way)." >&2
  exit 1
fi
