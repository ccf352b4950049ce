//! What becomes of command lines.
#![allow(clippy::unwrap_used)]

use super::super::recorded::{arguments, check};
use super::*;
use heddle_proto::QemuSpec;

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
        "file={disk:0},if=none,format=qcow2,cache=unsafe,id=heddle-disk0-image",
        "driver=blkreplay,if=none,image=heddle-disk0-image,id=heddle-disk0",
        "virtio-blk-pci,drive=heddle-disk0",
        "filter-replay,id=n0-replay,netdev=n0",
        "virtio-net-pci,netdev=n0,tx=timer",
        "apic-common.vapic=off",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(
        of("-device e1000,romfile= -M q35 -machine graphics=off")
            .unwrap()
            .arguments
            .join(" ")
            .contains("romfile=")
    );
    assert_eq!(of("-M q35 -machine graphics=off -machine accel=tcg").unwrap().machine, "q35");
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
        ("-device driver=vfio-pci,host=1", "vfio-pci"),
        ("-device {\"driver\":\"vfio-pci\"}", "vfio-pci"),
        ("-nic user,hostfwd=tcp::1-:22", "hostfwd"),
        ("-M pc,dumpdtb=x", "dumpdtb"),
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
    check(&spec(&good.arguments.join(" ")).arguments).unwrap();
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
        "-monitor tcp:0.0.0.0:4444,server=on",
        "-serial /dev/ttyS0",
        "-serial pty",
        "-display vnc=:0",
        "-nic tap",
        "-netdev tap,id=n",
        "-chardev socket,id=c,host=h,port=1",
        "-drive driver=nbd,host=h",
        "-drive file={disk:0},if=pflash,format=vmdk",
        "-device {\"driver\":\"loader\",\"file\":\"/etc/shadow\"}",
        "-device driver=vfio-pci,host=01:00.0",
        "-object {\"qom-type\":\"memory-backend-file\",\"mem-path\":\"/x\"}",
        "-initrd {file:0},/etc/shadow",
        "-machine dumpdtb=/x",
    ] {
        assert!(check(&spec(bad).arguments).is_err(), "{bad}");
    }
    let files = [PathBuf::from("/s/f0")];
    let line =
        arguments(&spec("-kernel {file:0} -serial file:{scratch}/s"), &files, &[], "/s".as_ref()).unwrap();
    assert_eq!(line, ["-kernel", "/s/f0", "-serial", "file:/s/s"]);
    assert!(arguments(&spec("-kernel {file:1}"), &files, &[], "/s".as_ref()).is_err());
}
