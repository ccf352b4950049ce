//! QEMU's options: which are recorded as they are, which are not recorded, and why.

/// Options without a value that change nothing outside the guest.
pub(super) const FLAGS: [&str; 9] = [
    "nographic",
    "no-reboot",
    "no-hpet",
    "no-acpi",
    "nodefaults",
    "no-user-config",
    "no-fd-bootchk",
    "usb",
    "nodefconfig",
];
/// Those of them that QEMU 10 has no more, and what it has instead.
pub(super) const GONE_IN_10: [(&str, &str); 3] =
    [("no-hpet", "-machine hpet=off"), ("no-acpi", "-machine acpi=off"), ("nodefconfig", "-no-user-config")];
/// Options whose value stays as it is.
pub(super) const PLAIN: [&str; 13] = [
    "cpu", "append", "boot", "uuid", "global", "vga", "k", "seed", "audiodev", "watchdog", "name", "g",
    "action",
];
/// Properties of a machine that name files of the host.
pub(super) const MACHINE_FILES: [&str; 5] = ["kernel", "initrd", "dtb", "firmware", "dumpdtb"];
/// Options whose value is a file.
pub(super) const FILES: [&str; 5] = ["kernel", "initrd", "bios", "dtb", "option-rom"];
pub(super) const DRIVE_LETTERS: [&str; 4] = ["hda", "hdb", "hdc", "hdd"];
/// Options that can't be recorded, and what to do instead.
pub(super) const REFUSED: [(&str, &str); 33] = [
    ("snapshot", "every disk gets an overlay of its own anyway; leave it out"),
    ("enable-kvm", "instructions are counted by TCG alone; leave it out"),
    ("accel", "only tcg counts instructions; leave it out"),
    ("daemonize", "the recording's node owns the process; leave it out"),
    ("incoming", "a recording begins at power-on"),
    ("loadvm", "a recording begins at power-on"),
    ("S", "the guest starts when the recording is open; leave it out"),
    ("s", "attach a debugger to a replay: heddle debug"),
    ("gdb", "attach a debugger to a replay: heddle debug"),
    ("qmp", "monitor commands are not recorded; leave it out"),
    ("qmp-pretty", "monitor commands are not recorded; leave it out"),
    ("mon", "monitor commands are not recorded; leave it out"),
    ("blockdev", "give the disk with -drive file=FILE,if=none,id=ID"),
    ("pflash", "use -bios, or -drive if=pflash,readonly=on"),
    ("sd", "use -drive if=virtio"),
    ("mtdblock", "use -drive if=virtio"),
    ("fda", "use -drive if=virtio or if=ide"),
    ("fdb", "use -drive if=virtio or if=ide"),
    ("virtfs", "9p has no replay hooks; put the files on a disk"),
    ("fsdev", "9p has no replay hooks; put the files on a disk"),
    ("semihosting", "host calls are not recorded"),
    ("semihosting-config", "host calls are not recorded"),
    ("vnc", "use -display none; a display's input can't be given to a recording yet"),
    ("spice", "use -display none; a display's input can't be given to a recording yet"),
    ("usbdevice", "host USB has no replay hooks; use -device usb-kbd and such"),
    ("readconfig", "give the options on the command line: each is checked"),
    ("sandbox", "it is set for every run; leave it out"),
    ("pidfile", "the recording's node owns the process; leave it out"),
    ("runas", "run heddle as that user"),
    ("chroot", "run heddle there"),
    ("L", "name the firmware with -bios: it goes with the recording"),
    ("no-shutdown", "it is set for every run; leave it out"),
    ("smbios", "its files are not stored yet"),
];
/// Devices that can't be recorded, by the beginning of their names.
pub(super) const REFUSED_DEVICES: [(&str, &str); 8] = [
    ("vfio", "host devices have no replay hooks"),
    ("vhost", "vhost runs outside QEMU; use the virtio device without vhost"),
    ("usb-host", "host USB has no replay hooks"),
    ("usb-redir", "host USB has no replay hooks"),
    ("virtio-9p", "9p has no replay hooks; put the files on a disk"),
    ("pvpanic-host", "it is not known to replay"),
    ("virtio-gpu-gl", "3D rendering has no replay hooks; use virtio-gpu"),
    ("ivshmem", "shared memory has no replay hooks"),
];

/// Why a device can't be recorded, if it can't.
pub(super) fn refused_device(name: &str) -> Option<&'static str> {
    REFUSED_DEVICES.iter().find(|(refused, _)| name.starts_with(refused)).map(|(_, why)| *why)
}

/// Whether a firmware option asks for none, or for what QEMU brings itself.
pub(super) fn is_own_firmware(name: &str, value: &str) -> bool {
    name == "bios" && ["none", "default"].contains(&value)
}
