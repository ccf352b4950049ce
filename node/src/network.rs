//! The guest's network card, outside: a datagram socket, one frame a datagram.
//!
//! What comes in is recorded before the guest sees it. What does not fit, or comes faster
//! than the guest takes it, is dropped, as a wire does; so is what nobody takes from the guest.

use anyhow::{Context, Result, ensure};
use heddle_replay_engine::AsyncQueue;
use heddle_replay_engine::machine::FRAME_BYTES_MAX;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram as Outgoing;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::UnixDatagram;

/// Where the card is plugged in: `unix:PATH[,peer=PATH]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netdev {
    /// The card's own socket, made for the recording.
    pub path: PathBuf,
    /// Who gets what the guest sends; otherwise, who sent last.
    pub peer: Option<PathBuf>,
}

impl FromStr for Netdev {
    type Err = String;
    fn from_str(text: &str) -> Result<Netdev, String> {
        let wrong = || format!("{text:?} is not unix:PATH or unix:PATH,peer=PATH");
        let paths = text.strip_prefix("unix:").ok_or_else(wrong)?;
        let (path, peer) = match paths.split_once(',') {
            None => (paths, None),
            Some((path, option)) => (path, Some(option.strip_prefix("peer=").ok_or_else(wrong)?)),
        };
        if path.is_empty() || peer.is_some_and(|peer| peer.is_empty() || peer.contains(',')) {
            return Err(wrong());
        }
        Ok(Netdev { path: path.into(), peer: peer.map(PathBuf::from) })
    }
}

/// The socket while a recording runs; its file goes with it.
pub(crate) struct Network {
    incoming: Arc<UnixDatagram>,
    /// The same socket without the runtime, whose idea of when there is room comes late.
    outgoing: Arc<Outgoing>,
    path: PathBuf,
    peer: Arc<Mutex<Option<PathBuf>>>,
}

impl Network {
    /// Makes the socket. A socket that a dead recording left there is replaced.
    pub(crate) fn open(netdev: &Netdev) -> Result<Network> {
        let path = netdev.path.clone();
        if let Ok(there) = std::fs::symlink_metadata(&path) {
            ensure!(there.file_type().is_socket(), "{} is there and is no socket", path.display());
            std::fs::remove_file(&path).with_context(|| format!("replace {}", path.display()))?;
        }
        let outgoing = Outgoing::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
        outgoing.set_nonblocking(true).context("set up the network's socket")?;
        let incoming = outgoing.try_clone().and_then(UnixDatagram::from_std);
        let incoming = Arc::new(incoming.context("set up the network's socket")?);
        let peer = Arc::new(Mutex::new(netdev.peer.clone()));
        Ok(Network { incoming, outgoing: Arc::new(outgoing), path, peer })
    }

    /// The way out, for the recording's own threads. It never waits.
    pub(crate) fn sender(&self) -> impl FnMut(&[u8]) + Send + use<> {
        let (outgoing, peer) = (self.outgoing.clone(), self.peer.clone());
        move |frame: &[u8]| {
            if let Some(peer) = &*peer.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = outgoing.send_to(frame, peer);
            }
        }
    }

    /// The way in: frames to the guest's queue, until the task is dropped; `wake` after each.
    pub(crate) fn receive<W: Fn() + Send + 'static>(
        &self,
        queue: AsyncQueue,
        wake: W,
    ) -> impl Future<Output = ()> + Send + use<W> {
        let (incoming, peer) = (self.incoming.clone(), self.peer.clone());
        let is_fixed = peer.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        async move {
            // One byte more, so that a frame that was cut is seen as too long.
            let mut frame = vec![0; FRAME_BYTES_MAX + 1];
            while let Ok((bytes, from)) = incoming.recv_from(&mut frame).await {
                if !is_fixed && let Some(path) = from.as_pathname() {
                    *peer.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_path_buf());
                }
                queue.push_frame(frame[..bytes].to_vec());
                wake();
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn frames_go_both_ways_and_the_socket_goes_with_the_recording() {
        let dir = tempfile::tempdir().unwrap();
        let (card, peer) = (dir.path().join("card"), dir.path().join("peer"));
        let other = UnixDatagram::bind(&peer).unwrap();
        let network = Network::open(&Netdev { path: card.clone(), peer: None }).unwrap();
        let (woken, mut wakes) = tokio::sync::mpsc::unbounded_channel();
        let wake = move || {
            let _gone = woken.send(());
        };
        let receiving = tokio::spawn(network.receive(AsyncQueue::default(), wake));
        let mut send = network.sender();
        send(b"to nobody");
        other.send_to(b"hello", &card).await.unwrap();
        wakes.recv().await.unwrap();
        send(b"back");
        let mut frame = [0; 16];
        let bytes = other.recv(&mut frame).await.unwrap();
        assert_eq!(&frame[..bytes], b"back");
        receiving.abort();
        drop(network);
        assert!(!card.exists());
        std::fs::write(&card, "a file of the user's").unwrap();
        assert!(Network::open(&Netdev { path: card, peer: None }).is_err());
    }

    #[test]
    fn a_netdev_says_where_it_is_plugged_in() {
        let of = |text: &str| text.parse::<Netdev>();
        assert_eq!(of("unix:/a").unwrap(), Netdev { path: "/a".into(), peer: None });
        assert_eq!(of("unix:a,peer=/b").unwrap(), Netdev { path: "a".into(), peer: Some("/b".into()) });
        for wrong in
            ["", "/a", "unix:", "unix:/a,", "unix:/a,peer=", "unix:/a,/b", "unix:/a,peer=/b,c", "tap:a"]
        {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
    }
}
