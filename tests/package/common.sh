# shellcheck shell=bash
# For build, scratch and boot: roots of Debian releases, made once, and a package with a higher version.

caller=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
project=$(cd "$here/../.." && pwd -P) || exit 1
roots=${NETPROXY_ROOTS:-${XDG_CACHE_HOME:-$HOME/.cache}/netproxy-roots}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

need() {  # PROGRAM:PACKAGE...
    local pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || die "${pair%%:*} is missing (on Debian: apt-get install ${pair##*:})"
    done
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }

copy_checkout() {  # DIRECTORY: what belongs to the project, without what lies about
    mkdir -p "$1" || return
    if [ -e "$project/.git" ]; then
        (cd "$project" && git ls-files -z --cached --others --exclude-standard | tar c --null --ignore-failed-read -T - 2>/dev/null) |
            tar x -C "$1"
    else
        tar c -C "$project" --exclude-vcs . | tar x -C "$1"
    fi
}

make_root() {  # KIND SUITE: the path of a root's archive
    local kind=$1 suite=$2 archive options source
    archive=$roots/$suite-$kind.tar
    if [ ! -s "$archive" ]; then
        need mmdebstrap:mmdebstrap
        case $kind in
            # nothing but what every Debian has; the packages that ours needs are there to be installed, without a network
            minimal)
                # shellcheck disable=SC2016
                options=(--customize-hook='chroot "$1" apt-get -qq -y --download-only --no-install-recommends install adduser python3-yaml') ;;
            # that boots, with what the tests use
            boot)
                options=(--include=adduser,curl,python3-yaml,systemd,systemd-sysv) ;;
            # for autopkgtest, with what debian/tests/control names
            test)
                options=(--include=adduser,apt-utils,bind9-dnsutils,curl,dpkg-dev,python3-yaml) ;;
            # for piuparts, which would bring logrotate itself, and blame us for what the systemd leaves that comes with it
            piuparts)
                options=(--include=logrotate) ;;
            # for the unit tests
            python)
                options=(--include=curl,iproute2,openssl,procps,python3-h11,python3-hypothesis,python3-pytest,python3-yaml) ;;
        esac
        case $suite in      # Ubuntu's are known by their names; its minimal variant has no apt, and what we use is in universe
            jammy|noble)
                source=(http://archive.ubuntu.com/ubuntu)
                options+=(--include=apt --components=main,universe
                          --keyring="${NETPROXY_UBUNTU_KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}") ;;
            *) source=() ;;
        esac
        say "making a root of $suite ($kind)"
        mkdir -p "$roots" || return
        mmdebstrap --quiet --mode=root --variant=minbase --skip=cleanup/apt "${options[@]}" "$suite" "$archive.new.tar" "${source[@]}" >&2 || return
        mv "$archive.new.tar" "$archive"
    fi
    echo "$archive"
}

unpack_root() {  # KIND SUITE DIRECTORY
    local archive
    archive=$(make_root "$1" "$2") || die "no root of $2"
    mkdir -p "$3" && tar xf "$archive" -C "$3" || die "cannot unpack $archive"
}

make_newer() {  # PACKAGE.deb NEW.deb: the same with a higher version, and another configuration file
    local tree
    tree=$(mktemp -d) || return
    dpkg-deb -R "$1" "$tree" || return
    sed -i 's/^\(Version: .*\)$/\1+newer/' "$tree/DEBIAN/control"
    echo "# a newer file" >>"$tree/etc/netproxy/netproxyd.yaml"
    (cd "$tree" && find . -type f -not -path './DEBIAN/*' -printf '%P\0' | xargs -0 md5sum >DEBIAN/md5sums)
    dpkg-deb --root-owner-group -b "$tree" "$2" >/dev/null || return
    rm -rf "$tree"
}

enter() {  # DIRECTORY OPTION-OR-COMMAND...: in a container with a network of its own, loopback only
    local root=$1
    shift
    # what is not booted is not process 1 either, to which signals mean something else
    [ "$1" = -b ] || set -- --as-pid2 "$@"
    systemd-nspawn -q -D "$root" --timezone=off --private-network --register=no --keep-unit --console=pipe "$@" </dev/null
}
