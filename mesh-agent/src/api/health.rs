//! Is it alive, is it of use, and how much of everything.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::Api;
use crate::status::Observed;

pub(super) fn routes() -> Router<Api> {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
}

async fn ready(State(api): State<Api>) -> (StatusCode, String) {
    match readiness(&api.board.observed()) {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
    }
}

/// Ready once every source has been read and every reconciler has succeeded once. A later failure is an
/// issue, not a reason to send work elsewhere: what was enforced stays.
fn readiness(seen: &Observed) -> Result<(), String> {
    if let Some(source) = seen.snapshot.sources.iter().find(|source| !source.synced) {
        return Err(format!("source {} has not been read yet", source.name));
    }
    match seen.reconcilers.iter().find(|row| row.generation == 0) {
        Some(row) => Err(format!("{} {}", row.name, row.error.as_deref().unwrap_or("has not run yet"))),
        None => Ok(()),
    }
}

async fn metrics(State(api): State<Api>) -> Response {
    match api.metrics.encode(&api.board.observed()).await {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => super::refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use mesh_api::status::SourceStatus;

    use super::*;
    use crate::desired::Desired;
    use crate::reconcile::Report;
    use crate::snapshot::Snapshot;
    use crate::status::Board;

    #[test]
    fn it_is_ready_once_all_is_read_and_done() {
        let board = Board::new(&["policy"]);
        let source = |synced| SourceStatus { name: "directory".into(), synced, objects: 0 };
        let planned = |synced| {
            let snapshot = Snapshot { generation: 1, sources: vec![source(synced)], ..Snapshot::default() };
            board.planned(Arc::new(snapshot), Arc::new(Desired::default()), Vec::new());
        };
        planned(false);
        assert_eq!(readiness(&board.observed()).unwrap_err(), "source directory has not been read yet");
        planned(true);
        assert_eq!(readiness(&board.observed()).unwrap_err(), "policy has not run yet");
        board.passed("policy", 1, &Ok(Report::default()));
        assert_eq!(readiness(&board.observed()), Ok(()));
    }
}
