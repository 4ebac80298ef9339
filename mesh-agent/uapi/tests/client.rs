//! The client against servers that misbehave.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use mesh_uapi::{Client, Op};

/// A server that reads a request of `want` bytes and answers each connection with `reply`.
fn server(reply: &'static str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wg.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut seen = Vec::new();
            while !seen.ends_with(b"\n\n") {
                let mut byte = [0];
                if stream.read(&mut byte).unwrap() == 0 {
                    break;
                }
                seen.push(byte[0]);
            }
            if reply != "(silence)" {
                stream.write_all(reply.as_bytes()).unwrap();
            } else {
                thread::sleep(Duration::from_secs(60));
            }
        }
    });
    (dir, path)
}

#[test]
fn an_absent_server_is_named_with_its_socket_and_errno() {
    let error = Client::new("/nonexistent/wg9.sock").get().unwrap_err();
    assert!(error.is_absent());
    assert_eq!(error.errno(), Some(2));
    assert!(error.to_string().starts_with("/nonexistent/wg9.sock: cannot connect: "), "{error}");
}

#[test]
fn a_refusal_is_named_with_its_socket_and_errno() {
    let (_dir, path) = server("errno=-98\n\n");
    let error = Client::new(&path).apply(&[Op::SetListenPort(1)]).unwrap_err();
    assert_eq!(error.errno(), Some(98));
    let why = "set: refused with errno 98 (Address already in use (os error 98))";
    assert_eq!(error.to_string(), format!("{}: {why}", path.display()));
}

#[test]
fn a_silent_server_costs_the_timeout_and_no_more() {
    let (_dir, path) = server("(silence)");
    let start = Instant::now();
    assert!(Client::new(&path).with_timeout(Duration::from_millis(200)).get().is_err());
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_reply_that_ends_early_is_an_error() {
    let (_dir, path) = server("listen_port=5\n");
    let error = Client::new(&path).get().unwrap_err();
    assert!(error.to_string().contains("ends before its empty line"), "{error}");
}

#[test]
fn a_reply_is_read() {
    let (_dir, path) = server("listen_port=5\nerrno=0\n\n");
    assert_eq!(Client::new(&path).get().unwrap().listen_port, 5);
}
