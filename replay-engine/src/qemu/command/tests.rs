//! What becomes of command lines.
#![allow(clippy::unwrap_used)]

use super::*;

const X86: Target<'static> = Target { arch: "x86_64", dialect: Dialect::Qemu7 };

fn of(line: &str) -> Result<Plan, Refused> {
    plan(&line.split_whitespace().map(String::from).collect::<Vec<_>>(), X86)
}

#[test]
fn files_disks_and_networks_are_taken_over() {
    let plan = of("-M pc -m 256 -nographic -kernel vmlinuz -append console=ttyS0 -drive file=d.img,if=virtio,format=raw \
                   -netdev user,id=n0 -device virtio-net-pci,netdev=n0 -icount 5")
    .unwrap();
    let line = plan.arguments.join(" ");
    assert_eq!(plan.files, [PathBuf::from("vmlinuz")]);
    assert_eq!(plan.disks, [Disk { path: "d.img".into(), format: Some("raw".into()) }]);
    assert_eq!((plan.memory_bytes, plan.machine.as_str()), (256 << 20, "pc"));
    assert_eq!(plan.icount, "shift=5,sleep=on");
    for part in [
        "-kernel {file:0}",
        "file={disk:0},if=none,format=qcow2,id=heddle-disk0-image",
        "driver=blkreplay,if=none,image=heddle-disk0-image,id=heddle-disk0",
        "virtio-blk-pci,drive=heddle-disk0",
        "filter-replay,id=n0-replay,netdev=n0",
        "virtio-net-pci,netdev=n0,tx=timer",
        "apic-common.vapic=off",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(!of("-nodefaults -display none").unwrap().arguments.join(" ").contains("netdev"));
    assert!(of("").unwrap().arguments.join(" ").contains("e1000,netdev=heddle-net0"));
}

#[test]
fn what_cannot_be_replayed_is_refused_by_name() {
    for (line, name) in [
        ("-smp 2", "-smp 2"),
        ("-enable-kvm", "-enable-kvm"),
        ("-cpu host", "-cpu host"),
        ("-M pc,accel=kvm", "accel=kvm"),
        ("-accel kvm", "-accel kvm"),
        ("-snapshot", "-snapshot"),
        ("-rtc base=localtime", "localtime"),
        ("-device vfio-pci,host=01:00.0", "vfio-pci"),
        ("-device usb-host,hostbus=1", "usb-host"),
        ("-object rng-random,id=r,filename=/dev/random", "rng-random"),
        ("-netdev tap,id=n0", "tap"),
        ("-icount shift=5,sleep=off", "sleep=off"),
        ("-drive file=x,if=floppy", "floppy"),
        ("-blockdev driver=file,filename=x", "-blockdev"),
        ("-serial tcp::1234,server", "tcp"),
        ("-no-such-option 1", "-no-such-option"),
        ("-kernel", "-kernel"),
        ("-append {file:7}", "{file:7}"),
    ] {
        let refused = of(line).unwrap_err();
        assert!(refused.what.contains(name), "{line}: {refused}");
        assert!(refused.why.len() > 10, "{line}: {refused}");
    }
}

#[test]
fn a_recorded_command_line_is_held_to_the_same_rules() {
    let spec = |line: &str| QemuSpec {
        version: "7.2.22".into(),
        program: "qemu-system-x86_64".into(),
        machine_type: "pc-i440fx-7.2".into(),
        arguments: line.split_whitespace().map(String::from).collect(),
        files: vec![],
        disks: vec![],
        icount: "shift=auto,sleep=on".into(),
        roles: heddle_proto::qemu::RoleSource::Tap,
        memory_bytes: 1 << 20,
    };
    let good = of("-M q35 -kernel k -initrd i -drive file=d,if=virtio -serial file:x -nic user -append a=/b")
        .unwrap();
    check(&spec(&good.arguments.join(" "))).unwrap();
    for bad in [
        "-kernel /etc/shadow",
        "-drive file=/etc/shadow,if=none",
        "-serial file:/root/.bashrc",
        "-serial unix:{scratch}/x",
        "-device loader,file=/etc/shadow",
        "-chardev socket,id=x,path=/run/x",
        "-netdev user,id=n,hostfwd=tcp::22-:22",
        "-monitor",
        "-plugin x.so",
        "/etc/passwd",
        "-incoming exec:id",
    ] {
        assert!(check(&spec(bad)).is_err(), "{bad}");
    }
    let files = [PathBuf::from("/s/f0")];
    let line =
        arguments(&spec("-kernel {file:0} -serial file:{scratch}/s"), &files, &[], "/s".as_ref()).unwrap();
    assert_eq!(line, ["-kernel", "/s/f0", "-serial", "file:/s/s"]);
    assert!(arguments(&spec("-kernel {file:1}"), &files, &[], "/s".as_ref()).is_err());
}
