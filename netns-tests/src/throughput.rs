//! How fast is it? One TCP stream between two pods.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::pods::Pod;

/// Streams from one pod to another for a while; megabits per second as received.
pub fn tcp(from: &Pod, to: &Pod, to_ip: IpAddr, lasting: Duration) -> Result<f64> {
    let listener =
        to.netns.run(|| TcpListener::bind(SocketAddr::new(to_ip, 0)))?.context("listen for the stream")?;
    let at = listener.local_addr().context("address of the stream")?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || -> std::io::Result<f64> {
            let (mut stream, _) = listener.accept()?;
            let mut buffer = vec![0; 256 << 10];
            let (mut bytes, start) = (0u64, Instant::now());
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    count => bytes += count as u64,
                }
            }
            Ok(bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e6)
        });
        let stream = from
            .netns
            .run(|| TcpStream::connect_timeout(&at, Duration::from_secs(5)))?
            .context("connect the stream");
        match stream {
            Ok(mut stream) => {
                let block = vec![0x5a; 256 << 10];
                let end = Instant::now() + lasting;
                while Instant::now() < end {
                    stream.write_all(&block).context("send the stream")?;
                }
            }
            Err(error) => {
                // The receiver waits in accept; call it from its own side, so that it ends.
                to.netns.run(|| TcpStream::connect(at).map(drop))?.ok();
                return Err(error);
            }
        }
        match receiver.join() {
            Ok(rate) => rate.context("receive the stream"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
