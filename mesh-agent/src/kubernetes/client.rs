//! The connection to the API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};
use zeroize::Zeroizing;

use crate::config::kubernetes::KubernetesConfig;
use crate::source::manifest;

/// A connection on which nothing comes and nothing is acknowledged for so long is dead, for watches wait on it in
/// silence: keepalives after the first of these, each so often, and no more of them than that.
const IDLE: Duration = Duration::from_secs(20);
const PROBE_EVERY: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;
/// What was sent is acknowledged within this.
const ACKNOWLEDGED: Duration = Duration::from_secs(20);
const CONNECTED: Duration = Duration::from_secs(10);
/// For an answer to anything but a watch.
pub const ANSWERED: Duration = Duration::from_secs(20);

/// Why there is no client. What is in a kubeconfig is told by no error.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file cannot be read, or is no kubeconfig.
    #[error("{}: {problem}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Not in a pod, or one without a service account.
    #[error("kubernetes: no kubeconfig is named, and this is no pod with a service account: {0}")]
    NotInCluster(String),
    /// The certificates or the credentials cannot be used.
    #[error("kubernetes: {0}")]
    Unusable(String),
}

/// A client as the configuration says. It connects when it is first used, and again whenever it has to.
pub async fn connect(config: &KubernetesConfig) -> Result<Client, ClientError> {
    let config = match &config.kubeconfig {
        Some(path) => from_file(path).await?,
        None => Config::incluster().map_err(|error| ClientError::NotInCluster(chain(&error)))?,
    };
    let unusable = |error: kube::Error| ClientError::Unusable(chain(&error));
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECTED));
    http.set_keepalive(Some(IDLE));
    http.set_keepalive_interval(Some(PROBE_EVERY));
    http.set_keepalive_retries(Some(PROBES));
    http.set_tcp_user_timeout(Some(ACKNOWLEDGED));
    let https = config.rustls_https_connector_with_connector(http).map_err(unusable)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(unusable)?)
        .map_err(BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build::<_, Body>(https));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

/// Our own parser, for that of the client shows in its errors the lines around them, tokens and all.
async fn from_file(path: &Path) -> Result<Config, ClientError> {
    let named = |problem: String| ClientError::Kubeconfig { path: path.to_owned(), problem };
    let text = std::fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
    let text = Zeroizing::new(text);
    let options = serde_saphyr::options! { with_snippet: false };
    let file: Kubeconfig = serde_saphyr::from_str_with_options(&text, options).map_err(|error| {
        let line = manifest::line_of(&error);
        named(format!("line {line}: {}", manifest::one_line(&manifest::without_place(&error))))
    })?;
    let options = KubeConfigOptions::default();
    Config::from_custom_kubeconfig(file, &options).await.map_err(|error| named(chain(&error)))
}

/// An error with all its causes, each once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    manifest::one_line(&text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_used_is_named_and_its_token_is_not_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kubeconfig");
        let config = KubernetesConfig { kubeconfig: Some(path.clone()) };
        assert!(connect(&config).await.err().unwrap().to_string().contains("kubeconfig"));
        for text in ["clusters: 7", "users: [{name: a, user: {token: geheim, password: [}}]", "{}"] {
            std::fs::write(&path, text).unwrap();
            let error = connect(&config).await.err().unwrap().to_string();
            assert!(error.starts_with(&path.display().to_string()), "{error}");
            assert!(!error.contains("geheim"), "{error}");
        }
    }
}
