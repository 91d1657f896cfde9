"""Loading a document of the course in the path; another course's document is a 404."""

from typing import Annotated

from fastapi import Depends

from backend.context import ContextDep
from backend.courses.dependencies import Member
from backend.documents import service
from backend.documents.models import Document
from backend.ids import RowId


def course_document(document_id: RowId, member: Member, context: ContextDep) -> Document:
    return service.get(context.database, member.course.id, document_id)


CourseDocument = Annotated[Document, Depends(course_document)]
