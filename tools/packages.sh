# Sourced by the scripts that install system packages: what they say, and how they ask apt.
wanted=()

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "root is needed once, to install: ${wanted[*]:-the package lists}. Run as root: apt-get update && apt-get install ${wanted[*]:-}"; fi
}
# Another apt may be at work, such as the first updates of a new machine: wait for it, for up to ten minutes.
apt() {
  local said tries
  as_root true
  said=$(mktemp)
  for tries in $(seq 120); do
    if as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@" 2>"$said"; then
      cat "$said" >&2; rm -f "$said"; return 0
    fi
    grep -q 'Could not get lock\|Unable to \(acquire\|lock\)' "$said" || break
    [ "$tries" != 1 ] || say "waiting for another apt to end: $(sed -n 's/.*held by process/process/p' "$said" | head -1)" >&2
    sleep 5
  done
  cat "$said" >&2; rm -f "$said"
  return 1
}
apt_update() {
  say "reading the package lists (apt-get update)"
  apt update | sed -u -n 's/^Get:[0-9]* [^ ]* \([^ ]*\) .*/    \1/p; s/^Fetched/    fetched/p'
}
apt_install() {
  say "installing system packages: $*"
  apt install -y --no-install-recommends "$@" | sed -u -n 's/^Get:\([0-9]*\) [^ ]* [^ ]* [^ ]* \([^ ]*\).*/    fetching \1: \2/p; s/^Setting up/    &/p'
}
