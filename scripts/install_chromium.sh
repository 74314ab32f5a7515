#!/bin/sh
# Chromium for `make test-browser`, from the distribution, when there is none.
set -eu
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing chromium with apt-get ..."
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
else
  echo "make test-browser needs Chromium, and only root can install it: apt-get install chromium (or your system's way)." >&2
  exit 1
fi
