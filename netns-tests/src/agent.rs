//! A client of the agent's sockets.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_api::defaults::{CONTROL_SOCKET, METRICS_ADDRESS, RUN_DIR, STATUS_SOCKET};
use mesh_api::status::{DenyEvent, PolicyStatus, Status, Synced};
use serde::de::DeserializeOwned;

use crate::host::Host;
use crate::http::exchange;
use crate::wait;

/// For an answer. One that reads everything again from a busy API server takes its time.
const PATIENCE: Duration = Duration::from_secs(60);

/// The agent of one host.
#[derive(Debug, Clone)]
pub struct Agent {
    run: PathBuf,
    name: String,
}

impl Agent {
    /// The agent that runs on this host.
    pub fn of(host: &Host) -> Self {
        Self { run: host.path(RUN_DIR), name: host.name().into() }
    }

    /// The agent of the host this runs on.
    pub fn here() -> Self {
        Self { run: RUN_DIR.into(), name: "this host".into() }
    }

    /// The metrics of the agent in this network namespace.
    pub fn metrics() -> Result<String> {
        let mut stream = TcpStream::connect(METRICS_ADDRESS).context("connect to the metrics")?;
        stream.set_read_timeout(Some(PATIENCE)).context("set time-out")?;
        let body = exchange(&mut stream, "GET", "/metrics", None)?.good()?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// `/v1/status`.
    pub fn status(&self) -> Result<Status> {
        self.get("/v1/status")
    }

    /// `/v1/events`.
    pub fn events(&self) -> Result<Vec<DenyEvent>> {
        self.get("/v1/events")
    }

    /// `/v1/policies`.
    pub fn policies(&self) -> Result<Vec<PolicyStatus>> {
        self.get("/v1/policies")
    }

    /// Reads a path of the status socket.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.call(STATUS_SOCKET, "GET", path)
    }

    /// `POST /v1/sync`: the snapshot that holds all that the sources have now.
    pub fn sync(&self) -> Result<Synced> {
        self.call(CONTROL_SOCKET, "POST", "/v1/sync")
    }

    /// Waits until the kernel does what the sources say now.
    pub fn enforced(&self, limit: Duration) -> Result<()> {
        let synced = self.sync()?;
        self.reached(synced, limit)
    }

    /// Waits until a snapshot is carried out in full.
    pub fn reached(&self, synced: Synced, limit: Duration) -> Result<()> {
        let what = format!("generation {} on {}", synced.generation, self.name);
        wait::until(what, limit, || {
            let status = self.status()?;
            let (at, want) = (status.generation, synced.generation);
            if at.enforced >= want && at.policy >= want {
                return Ok(Some(()));
            }
            let open: Vec<String> = status
                .reconcilers
                .iter()
                .filter(|r| r.state != "done" || r.generation < want)
                .map(|r| {
                    format!("{} {} at {} {}", r.name, r.state, r.generation, r.error.as_deref().unwrap_or(""))
                })
                .collect();
            bail!("enforced {}, policy {}; {}", at.enforced, at.policy, open.join("; "))
        })
    }

    fn call<T: DeserializeOwned>(&self, socket: &str, method: &str, path: &str) -> Result<T> {
        let what = || format!("{method} {path} of the agent on {}", self.name);
        let body = request(&self.run.join(socket), method, path).with_context(what)?;
        serde_json::from_slice(&body).with_context(what)
    }
}

fn request(socket: &Path, method: &str, path: &str) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE)).context("set time-out")?;
    exchange(&mut stream, method, path, None)?.good()
}
