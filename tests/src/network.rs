//! A network that a test may cut: hosts are Linux network namespaces, joined by a bridge in
//! one more, the hub. No interface of this machine's own is touched. Takes root.
//!
//! ```text
//!   hub: the test -- br0 -+- port1 === eth0 : host 1, 10.77.0.1
//!        10.77.0.100      +- port2 === eth0 : host 2, 10.77.0.2
//!                         +- ...
//! ```
//!
//! Nobody answers for a host that is cut off: packets vanish, nothing is refused or reset.
//! Whom a host reaches is said by its table of neighbours, which is fixed. A packet to be
//! dropped goes to a hardware address that nobody has: the bridge shows it to all, and all
//! throw it away. (A kernel without `tc`'s actions can do this too, and a blackhole route
//! would tell the sender.)

use crate::{Said, leave_out, run};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

/// The hub's number among the hosts.
const HUB: u64 = 100;
/// Nobody's number.
const NOBODY: u64 = 255;

/// Hosts, from 1, and the hub. All is gone when this is dropped, also by a panic; a process
/// that runs on a host keeps the host until it ends, without the name.
pub struct Network {
    /// What its namespaces are called, but for their numbers.
    name: String,
    hosts: u64,
}

impl Network {
    /// So many hosts that all reach each other. `None`, and that is said, where this process
    /// may not make namespaces.
    pub fn new(hosts: u64) -> Option<Network> {
        assert!(hosts < HUB, "the hub's number is {HUB}");
        static MADE: AtomicU64 = AtomicU64::new(0);
        let name = format!("heddle-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let network = Network { name, hosts };
        let said = ip(&["netns", "add", &network.namespace(HUB)], "");
        let forbidden = ["Operation not permitted", "Permission denied"];
        if said.code != 0 && forbidden.iter().any(|why| said.err.contains(why)) {
            leave_out(format_args!("network namespaces are not permitted here ({})", said.err.trim()));
            return None;
        }
        said.expect(0);
        let (address, mac) = (address(HUB), mac(HUB));
        network.set(
            HUB,
            &format!(
                "link set lo up\n\
                 link add br0 address {mac} type bridge\n\
                 address add {address}/24 dev br0\n\
                 link set br0 up\n"
            ),
        );
        (1..=hosts).for_each(|host| network.add(host));
        network.heal();
        Some(network)
    }

    fn add(&self, host: u64) {
        let namespace = self.namespace(host);
        ip(&["netns", "add", &namespace], "").expect(0);
        let (address, mac) = (address(host), mac(host));
        self.set(
            HUB,
            &format!(
                "link add port{host} type veth peer name eth0 address {mac} netns {namespace}\n\
                 link set port{host} master br0\n\
                 neighbour add {address} lladdr {mac} dev br0 nud permanent\n"
            ),
        );
        self.set(
            host,
            &format!(
                "link set lo up\n\
                 address add {address}/24 dev eth0\n\
                 link set eth0 up\n{}",
                neighbour(HUB, HUB)
            ),
        );
    }

    /// A host's address.
    pub fn address(&self, host: u64) -> String {
        address(host)
    }

    /// The command that runs `program` on a host. It is the program's own process.
    pub fn command(&self, host: u64, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(program);
        command
    }

    /// Runs `work` on a thread in the hub: it, and all that it spawns, reach the hosts.
    pub fn block_on<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        let enter_and_run = || {
            let namespace = File::open(Path::new("/var/run/netns").join(self.namespace(HUB))).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            // One thread: sockets are made in the namespace of the thread that asks.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        };
        let ended = std::thread::scope(|scope| scope.spawn(enter_and_run).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A host reaches nobody, and nobody reaches it, the hub neither.
    pub fn cut(&self, host: u64) {
        self.set(HUB, &format!("link set port{host} down\n"));
    }

    /// Two hosts don't reach each other.
    pub fn cut_between(&self, a: u64, b: u64) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// What `from` sends to `to` is lost; what `to` sends arrives.
    pub fn cut_one_way(&self, from: u64, to: u64) {
        self.set(from, &neighbour(to, NOBODY));
    }

    /// Everybody reaches everybody.
    pub fn heal(&self) {
        for host in 1..=self.hosts {
            self.set(HUB, &format!("link set port{host} up\n"));
            let others = (1..=self.hosts).filter(|other| *other != host);
            let lines: String = others.map(|other| neighbour(other, other)).collect();
            self.set(host, &lines);
        }
    }

    fn namespace(&self, host: u64) -> String {
        format!("{}-{host}", self.name)
    }

    /// Has `ip` do this in a host's namespace, a line at a time.
    fn set(&self, host: u64, lines: &str) {
        ip(&["-n", &self.namespace(host), "-batch", "-"], lines).expect(0);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in (1..=self.hosts).chain([HUB]) {
            let mut command = Command::new("ip");
            let _ = command.args(["netns", "del", &self.namespace(host)]).stderr(Stdio::null()).status();
        }
    }
}

fn ip(arguments: &[&str], input: &str) -> Said {
    run(Command::new("ip").args(arguments), input.as_bytes())
}

fn address(host: u64) -> String {
    format!("10.77.0.{host}")
}

fn mac(host: u64) -> String {
    format!("02:00:00:00:00:{host:02x}")
}

/// A line for `ip` on a host: what goes to `other` is sent to the interface of `receiver`.
fn neighbour(other: u64, receiver: u64) -> String {
    let (address, mac) = (address(other), mac(receiver));
    format!("neighbour replace {address} lladdr {mac} dev eth0 nud permanent\n")
}
