//! Orders to change keys: of this node, or of all by raising `spec.rotationEpoch` where it is written.

use std::path::PathBuf;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use keyservice::rotation::MAX_EPOCH;
use mesh_api::status::{Ordered, RotationStatus};
use tokio::sync::{Mutex, mpsc, oneshot};

use super::{Api, refuse};
use crate::rotate::Order;
use crate::source::directory::edit::{EditError, raise_rotation_epoch};

/// Where orders go.
#[derive(Debug)]
pub struct Keys {
    orders: mpsc::Sender<Order>,
    /// `None` where an API server has it, which this agent may not write to.
    manifests: Option<PathBuf>,
    /// Two edits of the manifest at a time would be one.
    editing: Mutex<()>,
}

impl Keys {
    /// To the rotator, and to the directory that holds the MeshConfiguration, if one does.
    pub fn new(orders: mpsc::Sender<Order>, manifests: Option<PathBuf>) -> Self {
        Self { orders, manifests, editing: Mutex::new(()) }
    }
}

/// What changes keys; for the control socket.
pub(super) fn routes() -> Router<Api> {
    use axum::routing::post;
    Router::new().route("/v1/keys/rotate", post(rotate)).route("/v1/keys/rotate-all", post(rotate_all))
}

/// `/v1/keys`.
pub(super) async fn show(State(api): State<Api>) -> Json<RotationStatus> {
    Json(api.board.rotation())
}

fn not_there() -> Response {
    refuse(StatusCode::SERVICE_UNAVAILABLE, "this agent does not change keys now")
}

async fn rotate(State(api): State<Api>) -> Response {
    let Some(keys) = &api.keys else { return not_there() };
    let (order, answer) = oneshot::channel();
    if keys.orders.send(order).await.is_err() {
        return not_there();
    }
    match answer.await {
        Ok(ordered) => Json::<Ordered>(ordered).into_response(),
        Err(_) => not_there(),
    }
}

async fn rotate_all(State(api): State<Api>) -> Response {
    let Some(keys) = &api.keys else { return not_there() };
    let _turn = keys.editing.lock().await;
    let snapshot = api.store.current();
    let newest = snapshot.local.rotation.newest().map_or(0, |slot| slot.epoch);
    let epoch = snapshot.cluster.mesh.rotation.rotation_epoch.max(newest) + 1;
    if epoch > MAX_EPOCH {
        return refuse(StatusCode::CONFLICT, "there is no epoch after this one");
    }
    let Some(manifests) = keys.manifests.clone() else {
        let patch = format!("{{\"spec\":{{\"rotationEpoch\":{epoch}}}}}");
        let message = format!(
            "the MeshConfiguration is in the API server, and no node may change it: kubectl patch meshconfiguration \
             default --type merge -p '{patch}'"
        );
        return refuse(StatusCode::CONFLICT, message);
    };
    let edit = tokio::task::spawn_blocking(move || raise_rotation_epoch(&manifests, epoch));
    match edit.await {
        Ok(Ok(file)) => {
            // So that a second call raises it further.
            api.store.sync().await;
            let blocked = api.board.rotation().blocked;
            Json(Ordered { epoch, file: Some(file.display().to_string()), blocked }).into_response()
        }
        Ok(Err(error @ (EditError::Missing(_) | EditError::Odd { .. } | EditError::Busy(_)))) => {
            refuse(StatusCode::CONFLICT, error.to_string())
        }
        Ok(Err(error)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
