//! NATS's text protocol, as much as requests and acknowledged publishing need.
//!
//! ```text
//! server: INFO {...}                             once it is connected to, and when things change
//! client: CONNECT {...}   SUB <inbox>* 1   PING
//! server: PONG
//! client: PUB <subject> <reply> <bytes>\r\n<body>\r\n
//! server: MSG <reply> 1 <bytes>\r\n<body>\r\n
//! server: PING                                   now and then; PONG is expected
//! server: -ERR '<why>'                           and it may hang up
//! ```

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Longest line; INFO is the longest and has some 600 bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Longest body: we hear answers only, of a kilobyte.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Several small records go out in one write; one that is larger isn't copied.
const BUFFER_BYTES: usize = 128 << 10;
/// JetStream doesn't answer at all while it has no leader, so a request has to be made again soon.
const ANSWER: Duration = Duration::from_secs(1);

/// One connection, subscribed to an inbox of its own.
pub(super) struct Connection {
    pub(super) incoming: Incoming,
    pub(super) outgoing: Outgoing,
    /// Answers come to subjects that begin so.
    pub(super) inbox: String,
}

impl Connection {
    /// Connects and shakes hands.
    pub(super) async fn open(address: SocketAddr) -> Result<Connection> {
        timeout(ANSWER, Connection::shake_hands(address)).await.context("no greeting from NATS")?
    }

    async fn shake_hands(address: SocketAddr) -> Result<Connection> {
        let socket = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        socket.set_nodelay(true)?;
        // No two connections have the same, so a late answer to one that is gone reaches nobody.
        let inbox = format!("_INBOX.{}.", socket.local_addr()?.port());
        let (reading, writing) = socket.into_split();
        let incoming = Incoming { socket: BufReader::new(reading), line: String::new() };
        let outgoing = Outgoing { socket: BufWriter::with_capacity(BUFFER_BYTES, writing) };
        let mut connection = Connection { incoming, outgoing, inbox };
        let options = serde_json::json!({
            "verbose": false, "pedantic": false, "headers": false, "no_responders": false, "echo": true,
            "protocol": 1, "lang": "rust", "name": "heddle-bench", "version": env!("CARGO_PKG_VERSION"),
        });
        let hello = format!("CONNECT {options}\r\nSUB {}* 1\r\nPING\r\n", connection.inbox);
        connection.outgoing.say(&hello).await?;
        connection.outgoing.flush().await?;
        while !matches!(connection.incoming.next().await?, Said::Pong) {}
        Ok(connection)
    }

    /// Asks and waits for the JSON of the answer. For one question at a time.
    pub(super) async fn request(&mut self, subject: &str, body: &[u8]) -> Result<Value> {
        let reply = format!("{}answer", self.inbox);
        self.outgoing.publish(subject, &reply, body).await?;
        self.outgoing.flush().await?;
        let answer = timeout(ANSWER, self.answer()).await;
        let answer = answer.with_context(|| format!("no answer to {subject}"))??;
        serde_json::from_slice(&answer).with_context(|| format!("read the answer to {subject}"))
    }

    async fn answer(&mut self) -> Result<Vec<u8>> {
        loop {
            match self.incoming.next().await? {
                Said::Message { body, .. } => return Ok(body),
                Said::Ping => {
                    self.outgoing.pong().await?;
                    self.outgoing.flush().await?;
                }
                Said::Pong => {}
            }
        }
    }
}

/// What the server says that matters.
pub(super) enum Said {
    /// To our inbox.
    Message { subject: String, body: Vec<u8> },
    /// It wants a pong.
    Ping,
    /// It has read what came before our ping.
    Pong,
}

/// What the server says.
pub(super) struct Incoming {
    socket: BufReader<OwnedReadHalf>,
    line: String,
}

impl Incoming {
    /// The next thing it says; its complaints are errors.
    pub(super) async fn next(&mut self) -> Result<Said> {
        loop {
            self.line.clear();
            (&mut self.socket).take(LINE_BYTES_MAX).read_line(&mut self.line).await.context("hear NATS")?;
            ensure!(self.line.ends_with('\n'), "NATS hung up");
            let line = self.line.trim_end();
            match line.split_once(' ').unwrap_or((line, "")) {
                ("MSG", words) => {
                    let (subject, bytes) = addressed(words)?;
                    let subject = subject.to_string();
                    ensure!(bytes <= BODY_BYTES_MAX, "NATS sends {bytes} bytes");
                    let mut body = vec![0; bytes + 2];
                    self.socket.read_exact(&mut body).await.context("hear NATS")?;
                    ensure!(body.ends_with(b"\r\n"), "NATS's message doesn't end where it said");
                    body.truncate(bytes);
                    return Ok(Said::Message { subject, body });
                }
                ("PING", _) => return Ok(Said::Ping),
                ("PONG", _) => return Ok(Said::Pong),
                ("INFO" | "+OK", _) => {}
                _ => bail!("NATS says {line}"),
            }
        }
    }
}

/// Subject and length out of `SUBJECT SID [REPLY] BYTES`. JetStream's acknowledgements have an
/// empty reply, which leaves two spaces.
fn addressed(words: &str) -> Result<(&str, usize)> {
    let mut words = words.split_ascii_whitespace();
    let subject = words.next().context("a message without a subject")?;
    let bytes = words.next_back().context("a message without a length")?;
    Ok((subject, bytes.parse().context("a message's length")?))
}

/// What we say; it reaches the server with `flush`, or once the buffer is full.
pub(super) struct Outgoing {
    socket: BufWriter<OwnedWriteHalf>,
}

impl Outgoing {
    /// A message whose receiver answers to `reply`.
    pub(super) async fn publish(&mut self, subject: &str, reply: &str, body: &[u8]) -> Result<()> {
        self.say(&format!("PUB {subject} {reply} {}\r\n", body.len())).await?;
        self.socket.write_all(body).await.context("tell NATS")?;
        self.say("\r\n").await
    }

    /// The answer to a ping.
    pub(super) async fn pong(&mut self) -> Result<()> {
        self.say("PONG\r\n").await
    }

    /// Sends what is in the buffer.
    pub(super) async fn flush(&mut self) -> Result<()> {
        self.socket.flush().await.context("tell NATS")
    }

    async fn say(&mut self, text: &str) -> Result<()> {
        self.socket.write_all(text.as_bytes()).await.context("tell NATS")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_addressed_with_or_without_a_reply() {
        for words in ["_INBOX.7.1 1 27", "_INBOX.7.1 1  27", "_INBOX.7.1 1 $JS.ACK.x 27"] {
            assert_eq!(addressed(words).unwrap(), ("_INBOX.7.1", 27));
        }
        for words in ["", "_INBOX.7.1", "_INBOX.7.1 1 x", "_INBOX.7.1 1 -1"] {
            assert!(addressed(words).is_err());
        }
    }
}
