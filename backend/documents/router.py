"""Documents, passages and search of a course."""

from typing import Annotated

from fastapi import APIRouter, Query, Response, UploadFile

from backend.context import ContextDep
from backend.courses.dependencies import CourseTeacher, Member
from backend.documents import service
from backend.documents.dependencies import CourseDocument
from backend.documents.schemas import DocumentOut, DocumentText, PassageInPlace, SearchOut
from backend.ids import RowId

router = APIRouter(prefix="/api/courses/{course_id}", tags=["documents"])


@router.get("/documents")
def list_documents(member: Member, context: ContextDep) -> list[DocumentOut]:
    found = service.list_documents(context.database, member.course.id)
    return [DocumentOut.model_validate(document) for document in found]


@router.post("/documents", status_code=202)
def upload(file: UploadFile, teacher: CourseTeacher, context: ContextDep) -> DocumentOut:
    document = service.accept(
        context.database,
        context.storage,
        teacher.course.id,
        teacher.user.id,
        service.clean_name(file.filename or ""),
        file.file,
        context.settings.max_upload_bytes,
    )
    return DocumentOut.model_validate(document)


@router.get("/documents/{document_id}")
def get_document(document: CourseDocument) -> DocumentOut:
    return DocumentOut.model_validate(document)


@router.delete("/documents/{document_id}", status_code=204)
def delete_document(
    teacher: CourseTeacher, document: CourseDocument, context: ContextDep
) -> Response:
    service.delete(context.database, teacher.course.id, document.id)
    return Response(status_code=204)


@router.get("/documents/{document_id}/text")
def document_text(document: CourseDocument, context: ContextDep) -> DocumentText:
    return service.text(context.database, context.storage, document)


@router.post("/documents/{document_id}/retry", status_code=202)
def retry_document(
    teacher: CourseTeacher, document: CourseDocument, context: ContextDep
) -> DocumentOut:
    queued = service.retry(context.database, teacher.course.id, document.id)
    return DocumentOut.model_validate(queued)


@router.get("/search")
async def search(
    member: Member,
    context: ContextDep,
    q: Annotated[str, Query(min_length=1, max_length=2000)],
    k: Annotated[int, Query(ge=1, le=50)] = 8,
) -> SearchOut:
    return SearchOut(passages=await context.search.search(member.course.id, q, k))


@router.get("/passages/{passage_id}")
def passage(passage_id: RowId, member: Member, context: ContextDep) -> PassageInPlace:
    return service.passage_in_place(context.database, context.storage, member.course.id, passage_id)
