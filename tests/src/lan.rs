//! The other end of a recorded guest's network card: a neighbour that answers ARP and ping.
//!
//! One frame a datagram, on a Unix socket: neither root nor an interface of this machine's.
//! Of IP it knows no options and no fragments, and it never speaks first.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// The neighbour's address.
const ADDRESS: [u8; 4] = [10, 0, 0, 1];
/// Locally administered, for one host.
const MAC: [u8; 6] = [0x52, 0x55, 10, 0, 0, 1];
/// Longer than any frame of the card.
const FRAME_BYTES_MAX: usize = 2048;
const ETHERNET_BYTES: usize = 14;
const IP_BYTES: usize = 20;
const ICMP_BYTES: usize = 8;
/// Version 4, five words.
const IP_WITHOUT_OPTIONS: u8 = 0x45;
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];

/// A host at 10.0.0.1 that answers until it is told to leave.
pub struct Neighbour {
    path: PathBuf,
    answering: JoinHandle<Vec<Vec<u8>>>,
}

impl Neighbour {
    /// Answers at a socket of this path, in a thread. It ends with `leave`, or with the process.
    pub fn new(path: PathBuf) -> Neighbour {
        let socket = UnixDatagram::bind(&path).unwrap();
        Neighbour { path, answering: std::thread::spawn(move || answer_all(&socket)) }
    }

    /// Goes away, and its socket with it. All frames that it sent, in order.
    pub fn leave(self) -> Vec<Vec<u8>> {
        let stranger = UnixDatagram::unbound().unwrap();
        stranger.send_to(b"", &self.path).unwrap();
        std::fs::remove_file(&self.path).unwrap();
        self.answering.join().unwrap()
    }
}

/// Until a datagram is empty, which no frame is.
fn answer_all(socket: &UnixDatagram) -> Vec<Vec<u8>> {
    let mut sent = vec![];
    let mut frame = [0; FRAME_BYTES_MAX];
    loop {
        let (bytes, card) = socket.recv_from(&mut frame).unwrap();
        if bytes == 0 {
            return sent;
        }
        let answer = answer(&frame[..bytes]);
        if let (Some(answer), Some(card)) = (answer, card.as_pathname())
            && socket.send_to(&answer, card).is_ok()
        {
            sent.push(answer);
        }
    }
}

/// Most frames want none.
///
/// ```text
///   0    6      12     14
///   | to | from | type | ARP or IP
/// ```
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let (header, body) = frame.split_at_checked(ETHERNET_BYTES)?;
    let answer = match header[12..] {
        [0x08, 0x06] => arp(body)?,
        [0x08, 0x00] => echo(body)?,
        _ => return None,
    };
    Some([&header[6..12], &MAC[..], &header[12..], &answer[..]].concat())
}

/// Where the neighbour is, for who asks.
///
/// ```text
///   0                           6           8            14             18           24             28
///   | what addresses these are  | operation | asker's MAC | its address | MAC wanted | of this address |
/// ```
fn arp(asked: &[u8]) -> Option<Vec<u8>> {
    let is_for_us = asked.get(6..8)? == ARP_REQUEST && asked.get(24..28)? == ADDRESS;
    let asker = asked.get(8..18)?;
    is_for_us.then(|| [&asked[..6], &ARP_REPLY[..], &MAC[..], &ADDRESS[..], asker].concat())
}

/// A ping's answer: the same bytes back.
///
/// ```text
///   0         9          12     16   20     21   22    24
///   | 0x45 .. | protocol .. | from | to | type | code | sum | id, number, data
/// ```
fn echo(packet: &[u8]) -> Option<Vec<u8>> {
    let (header, message) = packet.split_at_checked(IP_BYTES)?;
    let is_for_us = header[0] == IP_WITHOUT_OPTIONS && header[9] == ICMP && header[16..] == ADDRESS;
    if !is_for_us || message.len() < ICMP_BYTES || message[0] != ECHO_REQUEST {
        return None;
    }
    let mut message = message.to_vec();
    message[0] = ECHO_REPLY;
    message[2..4].fill(0);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    // The addresses change places, which leaves the header's sum as it was.
    Some([&header[..12], &header[16..], &header[12..16], &message[..]].concat())
}

/// The internet's: RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(word(pair))).sum();
    // The first carry can make another.
    let once = (sum >> 16) + (sum & 0xffff);
    let twice = (once >> 16) + (once & 0xffff);
    !(twice as u16)
}
