#!/bin/sh
# Installs what tests/system-packages.txt, or the file given, lists: as root on Debian and its kin. Elsewhere says what is
# missing.
set -eu

list=${1:-$(dirname "$0")/system-packages.txt}
if ! command -v dpkg-query >/dev/null; then
    echo "not a Debian-like system: the counterparts of what $list lists are expected to be installed" >&2
    exit 0
fi

missing=
for package in $(grep -v '^#' "$list"); do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "these Debian packages are needed ($list); as root: apt-get install$missing" >&2
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
