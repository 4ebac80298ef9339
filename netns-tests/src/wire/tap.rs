//! A tap on a host's cable: hears what the host sends, and hands it frames that nobody sent.

use anyhow::{Context, Result};
use socket2::Socket;

use super::{Wire, relay};

/// A packet socket on the wire's end of one cable. Ends when dropped.
#[derive(Debug)]
pub struct Tap(Socket);

impl Tap {
    /// On the cable of `host`, which from now on sends finished packets of wire size only.
    pub fn on(wire: &Wire, host: &str) -> Result<Self> {
        let port = wire.port(host).with_context(|| format!("no host {host} on the wire"))?;
        let (netns, interface) = wire.ends.get(host).with_context(|| format!("no cable of {host}"))?;
        relay::finish_packets(netns, interface)?;
        wire.netns().run(|| relay::packet_socket(&port))?.map(Self)
    }

    /// Frames the host has sent since the last call, the oldest first; what came while 16 MB waited is lost.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        // Non-blocking: an error is the end of what waits.
        while let Ok(length) = std::io::Read::read(&mut &self.0, &mut buffer) {
            frames.push(buffer.get(..length).unwrap_or_default().to_vec());
        }
        frames
    }

    /// Hands the host a frame, as if it came over the wire.
    pub fn deliver(&self, frame: &[u8]) -> Result<()> {
        self.0.send(frame).map(drop).context("send a frame")
    }
}
