#!/bin/sh
# Installs what tests/system-packages.txt lists: as root on Debian and its kin. Elsewhere says what is missing.
set -eu

cd "$(dirname "$0")"
if ! command -v dpkg-query >/dev/null; then
    echo "not a Debian-like system: the tests expect the counterparts of tests/system-packages.txt to be installed" >&2
    exit 0
fi

missing=
for package in $(grep -v '^#' system-packages.txt); do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "the tests need these Debian packages; as root: apt-get install$missing" >&2
    exit 1
fi
echo "installing Debian packages:$missing" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # a list of words is meant
if ! { apt-get update && apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    exit 1
fi
