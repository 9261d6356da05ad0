#!/bin/bash
# Runs as the first process of new namespaces (private_systemd.py makes them) and becomes systemd. The host is read-only
# below; /etc is a copy, /run, /tmp, /var/tmp and /var/lib are empty, and systemd finds no unit but the few written here and those
# in $WORK/units. The program is laid out as the installation instructions do it: a virtual environment at
# /opt/weight-broker. $WORK appears as /run/private-systemd.
# Needs: WORK SOURCE PYTHON_PREFIX PYTHON_VERSION SITE_PACKAGES CGROUP_LAYOUT
set -euo pipefail
mount --make-rprivate /
mount -t proc proc /proc

stage=$WORK/stage
mkdir -p "$stage"
mount -t tmpfs -o mode=755 tmpfs "$stage"
bind_read_only() { mkdir -p "$2"; mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }

# /opt: a virtual environment whose interpreter and packages are those of the tests.
environment=$stage/opt/weight-broker
packages=lib/python$PYTHON_VERSION/site-packages
mkdir -p "$environment"/{bin,"$packages",source}
if [ "$PYTHON_PREFIX" = /usr ]; then home=/usr/bin; else
  home=/opt/python/bin
  bind_read_only "$PYTHON_PREFIX" "$stage/opt/python"
fi
printf 'home = %s\ninclude-system-site-packages = false\n' "$home" > "$environment/pyvenv.cfg"
ln -s "$home/python$PYTHON_VERSION" "$environment/bin/python"
bind_read_only "$SITE_PACKAGES" "$environment/dependencies"
for directory in client broker deploy tests; do
  bind_read_only "$SOURCE/$directory" "$environment/source/$directory"
done
printf '%s\n' /opt/weight-broker/source/{client,broker} /opt/weight-broker/dependencies \
  > "$environment/$packages/weight-broker.pth"
printf '#!/opt/weight-broker/bin/python\nfrom weight_brokerd.__main__ import main\nraise SystemExit(main())\n' \
  > "$environment/bin/weight-brokerd"
chmod 755 "$environment/bin/weight-brokerd"

# /etc: this host's, without its units and mounts.
cp -a /etc "$stage/etc"
rm -rf "$stage/etc/systemd/system" "$stage/etc/fstab"
mkdir "$stage/etc/systemd/system"
cp -a "$WORK/units/." "$stage/etc/systemd/system/"

# Empty targets in place of the distribution's, which would start udev, the journal and more.
mkdir "$stage/units" "$stage/empty"
for target in sysinit basic network multi-user shutdown; do
  printf '[Unit]\nDefaultDependencies=no\n' > "$stage/units/$target.target"
done

mount --rbind "$stage/opt" /opt
mount --bind "$stage/etc" /etc
mount --bind "$stage/units" /usr/lib/systemd/system
mount --bind "$stage/empty" /usr/lib/systemd/system-generators
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system /run/lock /run/private-systemd
mount --bind "$WORK" /run/private-systemd

umount -R /sys/fs/cgroup
mount -o remount,bind,ro /sys
if [ "$CGROUP_LAYOUT" = unified ]; then
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
fi

# The kernel's settings belong to the host.
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
for directory in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$directory"; done
mount -t tmpfs -o mode=755 tmpfs /var/lib
mount -o remount,bind,ro /

cd /
export container=private-systemd SYSTEMD_LOG_TARGET=null
# Its own log would go to the host's console.
exec /lib/systemd/systemd --system --unit=scenario.target --log-target=null --show-status=0 < /dev/null
