//! What the agent tells and takes: HTTP and JSON on two Unix sockets, health and metrics on TCP.
//!
//! `control.sock` is root's and has everything, `status.sock` is for the group `margay` and only reads.
//! Paths and bodies are in [`mesh_api::status`].

mod health;
mod keys;
mod nodes;
mod socket;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use mesh_api::status::{ApiError, DenyEvent, PeerStatus, PolicyStatus, Status, Synced};
use serde_json::{Value, json};

use crate::metrics::Metrics;
use crate::reconcile::policy::events::DenyLog;
use crate::status::Board;
use crate::store::Store;
pub use keys::Keys;
pub use socket::{prepare_run_dir, serve};

/// For all sources to be read again.
const SYNC_WITHIN: Duration = Duration::from_secs(30);

/// What the answers are made from. Clones share it.
#[derive(Debug, Clone)]
pub struct Api {
    /// What was seen.
    pub board: Board,
    /// What the sources said.
    pub store: Store,
    /// Denied packets.
    pub denied: DenyLog,
    /// Everything countable.
    pub metrics: Arc<Metrics>,
    /// Where orders to change keys go.
    pub keys: Option<Arc<Keys>>,
}

impl Api {
    /// `status.sock`: reads.
    pub fn reads(&self) -> Router {
        let forbidden = || post(|| async { refuse(StatusCode::FORBIDDEN, "only on control.sock") });
        let writes = ["/v1/sync", "/v1/keys/rotate", "/v1/keys/rotate-all", nodes::TRUST];
        writes
            .into_iter()
            .fold(self.routes(), |routes, path| routes.route(path, forbidden()))
            .with_state(self.clone())
    }

    /// `control.sock`: everything.
    pub fn control(&self) -> Router {
        self.routes()
            .route("/v1/sync", post(sync))
            .merge(keys::routes())
            .merge(nodes::routes())
            .with_state(self.clone())
    }

    /// TCP: `/healthz`, `/readyz`, `/metrics`.
    pub fn health(&self) -> Router {
        health::routes().fallback(not_found).method_not_allowed_fallback(not_allowed).with_state(self.clone())
    }

    fn routes(&self) -> Router<Self> {
        Router::new()
            .route("/v1/status", get(status))
            .route("/v1/peers", get(peers))
            .route("/v1/policies", get(policies))
            .route("/v1/events", get(events))
            .route("/v1/keys", get(keys::show))
            .route("/v1/dump", get(dump))
            .merge(health::routes())
            .fallback(not_found)
            .method_not_allowed_fallback(not_allowed)
    }
}

fn refuse(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(ApiError { error: error.into() })).into_response()
}

async fn not_found(uri: Uri) -> Response {
    refuse(StatusCode::NOT_FOUND, format!("{} does not exist", uri.path()))
}

async fn not_allowed(uri: Uri) -> Response {
    refuse(StatusCode::METHOD_NOT_ALLOWED, format!("{} has no such method", uri.path()))
}

async fn status(State(api): State<Api>) -> Json<Status> {
    Json(api.board.status(SystemTime::now()))
}

async fn peers(State(api): State<Api>) -> Json<Vec<PeerStatus>> {
    Json(api.board.status(SystemTime::now()).peers)
}

async fn policies(State(api): State<Api>) -> Json<Vec<PolicyStatus>> {
    Json(api.board.observed().policies)
}

async fn events(State(api): State<Api>) -> Json<Vec<DenyEvent>> {
    Json(api.denied.list())
}

/// For bug reports: the newest snapshot and its plan, as the code sees them. Neither type holds a secret.
async fn dump(State(api): State<Api>) -> Json<Value> {
    let seen = api.board.observed();
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    Json(json!({
        "status": api.board.status(SystemTime::now()),
        "policies": seen.policies,
        "events": api.denied.list(),
        "snapshot": lines(format!("{:#?}", seen.snapshot)),
        "desired": lines(format!("{:#?}", seen.desired)),
    }))
}

async fn sync(State(api): State<Api>) -> Response {
    match tokio::time::timeout(SYNC_WITHIN, api.store.sync()).await {
        Ok(generation) => Json(Synced { generation }).into_response(),
        Err(_) => refuse(
            StatusCode::GATEWAY_TIMEOUT,
            format!("the sources were not read within {} s", SYNC_WITHIN.as_secs()),
        ),
    }
}

#[cfg(test)]
mod tests;
