//! One HTTP request over the agent's Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use mesh_api::status::ApiError;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// More than the dump of a large mesh.
const MAX_ANSWER: usize = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(
        "mesh-agent is not running: no one answers {path} ({reason}); start it with `systemctl start mesh-agent`"
    )]
    NotThere { path: String, reason: String },
    #[error("no permission for {0}; be root, or in the group `margay` for reads")]
    Permission(String),
    #[error("mesh-agent did not answer within {0:?}")]
    Timeout(Duration),
    #[error("mesh-agent broke off its answer: {0}")]
    Broken(String),
    #[error("mesh-agent says: {message} ({status})")]
    Refused { status: StatusCode, message: String },
    #[error("mesh-agent's answer is not what this meshctl expects ({0}); are both of one version?")]
    Unexpected(serde_json::Error),
}

/// The agent as seen from here.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    path: PathBuf,
    timeout: Duration,
}

impl Client {
    pub(crate) fn new(path: &Path, timeout: Duration) -> Self {
        Self { path: path.to_owned(), timeout }
    }

    /// `GET path`, decoded.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path).await
    }

    /// `POST path` with an empty body, decoded.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::POST, path).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        let answer = tokio::time::timeout(self.timeout, self.exchange(method, path))
            .await
            .map_err(|_| ClientError::Timeout(self.timeout))?;
        let (status, body) = answer?;
        if !status.is_success() {
            let message = serde_json::from_slice::<ApiError>(&body)
                .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |answer| answer.error);
            return Err(ClientError::Refused { status, message });
        }
        serde_json::from_slice(&body).map_err(ClientError::Unexpected)
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|error| self.unreachable(&error))?;
        let broken = |error: &dyn std::fmt::Display| ClientError::Broken(error.to_string());
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "margay")
            .body(Empty::<Bytes>::new())
            .map_err(|e| broken(&e))?;
        let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| broken(&e))?;
        Ok((status, body.to_bytes()))
    }

    fn unreachable(&self, error: &std::io::Error) -> ClientError {
        let path = self.path.display().to_string();
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => ClientError::Permission(path),
            std::io::ErrorKind::NotFound => {
                ClientError::NotThere { path, reason: "no such socket".to_owned() }
            }
            _ => ClientError::NotThere { path, reason: error.to_string() },
        }
    }
}
