# shellcheck shell=bash
# Functions for the scripts of this folder: systems of Debian releases, which are created once, and
# a package with a higher version.

caller=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
project=$(cd "$here/../.." && pwd -P) || exit 1
roots=${NETPROXY_ROOTS:-${XDG_CACHE_HOME:-$HOME/.cache}/netproxy-roots}
# Of tests/run: a package and a system keep bytecode where Python always does.
unset PYTHONPYCACHEPREFIX

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

need() {  # PROGRAM:PACKAGE...
    local pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null ||
            die "${pair%%:*} is missing (on Debian: apt-get install ${pair##*:})"
    done
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }

copy_checkout() {  # DIRECTORY: copies the files of the project, without ignored files
    mkdir -p "$1" || return
    if [ -e "$project/.git" ]; then
        (
            cd "$project" &&
                git ls-files -z --cached --others --exclude-standard |
                tar c --null --ignore-failed-read -T - 2>/dev/null
        ) | tar x -C "$1"
    else
        tar c -C "$project" --exclude-vcs . | tar x -C "$1"
    fi
}

make_root() {  # KIND SUITE: creates the archive of a system, if need be, and prints its path
    local kind=$1 suite=$2 archive options source keyring
    archive=$roots/$suite-$kind.tar
    if [ ! -s "$archive" ]; then
        need mmdebstrap:mmdebstrap
        case $kind in
            # The packages of every Debian. Those that netproxyd needs are downloaded, so that they
            # can be installed without a network.
            minimal)
                # shellcheck disable=SC2016
                options=(--customize-hook='chroot "$1" apt-get -qq -y --download-only \
                    --no-install-recommends install adduser python3-yaml') ;;
            # A system that boots, with the programs that the tests use.
            boot)
                options=(--include=adduser,curl,python3-yaml,systemd,systemd-sysv) ;;
            # For autopkgtest, with the packages that debian/tests/control names.
            test)
                options=(--include=adduser,apt-utils,bind9-dnsutils,curl,dpkg-dev,python3-yaml) ;;
            # For piuparts. It would install logrotate itself, and report what the systemd that
            # comes with it leaves.
            piuparts)
                options=(--include=logrotate) ;;
            # For the unit tests.
            python)
                options=(--include=curl,iproute2,openssl,procps
                         --include=python3-h11,python3-hypothesis,python3-pytest,python3-yaml) ;;
        esac
        # Ubuntu's minimal variant has no apt, and some of the packages are in universe.
        case $suite in
            jammy|noble)
                source=(http://archive.ubuntu.com/ubuntu)
                keyring=${NETPROXY_UBUNTU_KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}
                options+=(--include=apt --components=main,universe --keyring="$keyring") ;;
            *) source=() ;;
        esac
        say "creating a system of $suite ($kind)"
        mkdir -p "$roots" || return
        mmdebstrap --quiet --mode=root --variant=minbase --skip=cleanup/apt "${options[@]}" \
            "$suite" "$archive.new.tar" "${source[@]}" >&2 || return
        mv "$archive.new.tar" "$archive"
    fi
    echo "$archive"
}

unpack_root() {  # KIND SUITE DIRECTORY
    local archive
    archive=$(make_root "$1" "$2") || die "cannot create a system of $2"
    mkdir -p "$3" && tar xf "$archive" -C "$3" || die "cannot unpack $archive"
}

make_newer() {  # PACKAGE.deb NEW.deb: copies a package with a higher version and another conffile
    local tree
    tree=$(mktemp -d) || return
    dpkg-deb -R "$1" "$tree" || return
    sed -i 's/^\(Version: .*\)$/\1+newer/' "$tree/DEBIAN/control"
    echo "# a newer file" >>"$tree/etc/netproxy/netproxyd.yaml"
    (
        cd "$tree" &&
            find . -type f -not -path './DEBIAN/*' -printf '%P\0' | xargs -0 md5sum >DEBIAN/md5sums
    )
    dpkg-deb --root-owner-group -b "$tree" "$2" >/dev/null || return
    rm -rf "$tree"
}

enter() {  # DIRECTORY OPTION-OR-COMMAND...: runs a container whose network is only loopback
    local root=$1
    shift
    # A command must not be process 1, which does not end on signals by default.
    [ "$1" = -b ] || set -- --as-pid2 "$@"
    systemd-nspawn -q -D "$root" --timezone=off --private-network --register=no --keep-unit \
        --console=pipe "$@" </dev/null
}
